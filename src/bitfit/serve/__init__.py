"""Serving: many tasks over one base, added, replaced and removed while they answer.

``shelf`` holds the tasks and ``engine`` answers with them; ``microbatch`` makes batches of
requests, ``service`` ties the three, ``app`` has the routes and ``run`` the process. From
``service`` on the extra ``serve`` is needed.
"""
