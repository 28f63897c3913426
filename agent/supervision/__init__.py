"""The processes that start a job, outlive the agent, and end the job: standard library only."""
