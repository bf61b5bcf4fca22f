"""Training: settings, what a method trains, the loop, and the whole run in ``finetune``."""
