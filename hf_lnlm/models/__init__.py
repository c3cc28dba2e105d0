"""Model families, one room (folder) each: `configuration_<family>.py` and `modeling_<family>.py`."""
