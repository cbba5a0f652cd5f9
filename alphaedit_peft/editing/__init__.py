"""Editing: from edits and a model to the change of each rewrite layer.

Prompts and contexts, keys and target values, one solve a layer, and the report of what took.
"""
