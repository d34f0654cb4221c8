"""What every part needs and none owns: files, progress, errors of commands, clocks, processes, charts.

May import: nothing else of the project.
"""
