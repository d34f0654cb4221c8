"""What every part needs and none owns: files, progress, errors of commands, modes of pictures, clocks, processes, charts.

May import: nothing else of the project.
"""
