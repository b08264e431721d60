"""All targets."""

from tests.fuzz import command_line, data, models, recordings

TARGETS = (*models.TARGETS, *data.TARGETS, *recordings.TARGETS, *command_line.TARGETS)
