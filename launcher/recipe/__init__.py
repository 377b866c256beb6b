"""Recipes: one YAML file says everything of a run; read, validated, described; nothing heavy."""
