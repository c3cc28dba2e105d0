"""What a run is, from a recipe to a trained, measured, Hub-ready folder; `hf-lnlm` calls these."""
