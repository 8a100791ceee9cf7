"""`python -m edgellm_agent` is `edgellm-agent`."""

from edgellm_agent.main import main

main()
