"""What the tasks with data of their own read: files to splits to strings, and an account of what was read.

* `files`: what stands at a path, and a stamp of its content
* `compressed`: the bytes of a file, expanded where they are compressed
* `lines`: bytes to lines and to text
* `names`: which split a name speaks of
* `layout`: which files of a folder are which split, and which are ignored
* `tables`, `fields`: tables to columns; `saved`: data sets of the `datasets` library; `columns`: columns to strings
* `labels`: which classes there are
* `splits`: the splits that a source lacks, and what is shared between them
* `account`: what was read, as a record and in words

Every failure to read becomes a UsageError that names the file and, where there is one, the line.
"""
