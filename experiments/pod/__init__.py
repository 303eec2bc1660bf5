"""What a TPU pod is asked for with: a GKE JobSet, or a queued-resource script, each printed by a main of its own."""
