"""fastattn inside the models of other libraries: `fastattn.integrations.huggingface`."""
