"""Tests of hf_lnlm.lora."""
