"""Training of sparsewsi: `python -m train.run`. Nothing here is imported by the package or the app."""
