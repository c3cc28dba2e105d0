"""Convolutional families: TextCNN, character CNN, VDCNN, gated convolutional language model."""
