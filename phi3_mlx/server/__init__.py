"""Answers for clients: the models of one process, the thread that runs them, and HTTP."""
