"""Joins the packages: a module for each process, whose function makes its parts from the settings, so that none imports what only
others need. Ray ships the functions' names; files and variables on the node say the rest, so that no secret travels."""
