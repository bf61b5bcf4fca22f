"""Many tasks behind one HTTP address: the shelf of tasks, the engine, the queue and the routes.

Needs the extra ``serve``. Nothing here is imported before ``bitfit serve`` (or a program of yours)
asks for it.
"""
