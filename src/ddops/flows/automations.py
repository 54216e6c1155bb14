"""What the server does by itself: a run that falls silent is crashed, and somebody is told of runs that end badly."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from prefect import get_client
from prefect.blocks.core import Block
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from pydantic import SecretStr

from ddops.flows.environment import HEARTBEAT_SECONDS

SILENT_AFTER = timedelta(seconds=3 * HEARTBEAT_SECONDS)
"""No heartbeat for so long, and a run is found crashed."""
NOTIFY_URL = "DDOPS_NOTIFY_URL"
BLOCK = "ddops-notifications"

HEARTBEAT = "prefect.flow-run.heartbeat"
ENDED_WELL = ("Completed", "Cancelled", "Cancelling")
ENDED_BADLY = ("Failed", "Crashed", "Refused", "TimedOut", "TryAgain", "ParametersRefused", "WorkspaceBusy")
"""Names of states, ours among them: an event is called after its state's name, not after its type."""

SUBJECT = "ddops: {{ flow.name }} is {{ flow_run.state.name }}"
BODY = """{{ flow_run.name }} of {{ deployment.name | default('no deployment', true) }}: {{ flow_run.state.name }}
{{ flow_run.state.message }}
{{ flow_run | ui_url }}"""


def _events(*names: str) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}


def crash_silent_runs() -> AutomationCore:
    """A run whose heart stopped is marked crashed: its machine or its processes are gone."""
    return AutomationCore(
        name="ddops: crash silent runs",
        description=f"No heartbeat for {SILENT_AFTER.total_seconds():g} s",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            after={HEARTBEAT},
            expect={HEARTBEAT} | _events(*ENDED_WELL, *ENDED_BADLY),
            posture=Posture.Proactive,
            threshold=1,
            within=SILENT_AFTER,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name=None,
                message=f"No sign of life for {SILENT_AFTER.total_seconds():g} s. The next run goes on from here.",
                force=False,
            )
        ],
    )


def tell_of_bad_ends(block_id: Any) -> AutomationCore:
    """Send a notification for each run that ends badly, a refused model among them, with the reason."""
    actions: list[ActionTypes] = [SendNotification(block_document_id=block_id, subject=SUBJECT, body=BODY)]
    return AutomationCore(
        name="ddops: tell of bad ends",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            expect=_events(*ENDED_BADLY),
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=actions,
    )


def notification_block(url: str) -> Block:
    """How to reach people: Slack by its incoming webhook, a mailbox by ``mailto(s)://``, any other address gets JSON by
    POST."""
    # Prefect's block for Slack passes an address that is not Slack's on to Apprise, which knows mail servers.
    if url.startswith(("https://hooks.slack.com/", "https://hooks.slack-gov.com/", "mailto://", "mailtos://")):
        return SlackWebhook(url=SecretStr(url))
    body = {"subject": "{{subject}}", "body": "{{body}}"}
    return CustomWebhookNotificationBlock(name=BLOCK, url=url, json_data=body, headers=None, cookies=None)


def install() -> None:
    """Make the server have these automations, anew if it had them."""
    automations = [crash_silent_runs()]
    if url := os.environ.get(NOTIFY_URL):
        block = notification_block(url)
        automations.append(tell_of_bad_ends(block.save(BLOCK, overwrite=True)))
    with get_client(sync_client=True) as client:
        for automation in automations:
            for known in client.read_automations_by_name(automation.name):
                client.delete_automation(known.id)
            client.create_automation(automation)
