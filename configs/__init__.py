"""Experiment configs: one file per data set and resolution, `get_config(variant='')`."""
