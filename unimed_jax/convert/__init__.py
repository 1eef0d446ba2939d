"""Other frameworks' weights in and out. torch is imported inside functions only."""
