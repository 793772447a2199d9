"""Files: what others made is read within bounds, what is made here appears whole or not at all."""
