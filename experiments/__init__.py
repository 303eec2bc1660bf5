"""Command lines: one absl main a stage, each of a few lines, and their configs."""
