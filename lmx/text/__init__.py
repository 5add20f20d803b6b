"""Unicode: grapheme clusters, scripts and words, normalisation."""
