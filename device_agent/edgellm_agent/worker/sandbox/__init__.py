"""The worker's sandbox: no network, no privileges, no files but its engine and its libraries.

What the worker computes with comes from outside: graphs, tokenizers, templates, grammars, prompts. Should a
flaw in a library let any of it run code, then that code can burn processor time and answer nonsense, which
the agent notices; it shall reach neither network, nor the agent's state and keys, nor other processes.

Three layers, each of which holds where another is missing: what the process may never gain or exceed
(`privileges`), which system calls it may make (`seccomp`), which files it may open (`landlock`). All are
inherited by the processes that it starts, and none can be taken off again.
"""

from edgellm_agent.worker.sandbox.confinement import Confinement, enter

__all__ = ["Confinement", "enter"]
