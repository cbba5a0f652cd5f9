"""Mutations of every valid artefact: each loads as something sane, or is refused in a sentence."""
