"""Shortens the waits between retries, in processes of tests whose Hub fails; Python imports it at its start."""

import time

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.1))
