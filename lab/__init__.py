"""Instruments around the six stages, each a command of its own: python -m lab.NAME --help"""
import common  # noqa: F401 (first: see train.py)
