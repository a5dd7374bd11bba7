"""Models: their names, their files on the Hub or on disk, and the decoder that is loaded."""
