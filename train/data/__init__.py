"""What is trained on and asked: question files, slides, mosaics."""
