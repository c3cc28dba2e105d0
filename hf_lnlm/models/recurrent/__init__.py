"""LSTM and GRU language models, classifiers and taggers."""
