"""Recognise parts of a graph; nothing here changes one."""
