"""What P says: its statistics with error bars, its pairs, its relations, several models."""
