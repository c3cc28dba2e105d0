"""Tests of hf_lnlm.trainer."""
