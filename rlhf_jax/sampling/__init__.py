"""From logits to rollouts; may import models, losses and what they import."""
