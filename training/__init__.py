"""The pipeline: from raw data and a teacher to a student's bundle. `python -m training --help`."""
