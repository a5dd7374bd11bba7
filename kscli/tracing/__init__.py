"""Which facts of an edited model were edited, and how: from its weights and those of the base."""
