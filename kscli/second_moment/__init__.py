"""C: keys of a corpus through the model, summed and averaged, in any number of pieces."""
