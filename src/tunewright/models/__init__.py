"""Pre-trained models: found, loaded, understood, prepared."""
