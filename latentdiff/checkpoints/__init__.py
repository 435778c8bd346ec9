"""Reading and writing models: families and names as data, files, LoRA."""
