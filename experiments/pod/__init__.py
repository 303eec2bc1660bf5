"""What a TPU pod is asked for with: a GKE JobSet, an XPK command or a queued-resource script, each by a main."""
