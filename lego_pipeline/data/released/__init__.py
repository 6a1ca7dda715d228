"""Readers of the files that the authors of LEGO released: labels, pairs and VLM features.

They become a manifest and an embedding cache, which is all that training, generation and evaluation read. Formats
from `BolinLai/LEGO` and its data-set card; no code of it is used.
"""
