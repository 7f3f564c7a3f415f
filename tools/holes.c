// SPDX-License-Identifier: GPL-2.0-only
/*
 * The holes of a base that an NBD server knows (base:allocation): the kernel is
 * told of them, and never asks the server for what is known to be zero.
 *
 * A process of its own does this, since a server may take long; cowctl waits only
 * a moment for it.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cowctl.h"
#include "nbd-calls.h"

#define KIND		"holes"
#define WAIT_MS		2000
#define ANSWER_S	60		/* a server may take for one answer */
#define REQUEST_BYTES	(UINT64_C(1) << 31)
#define MESSAGE_BYTES	8192

struct holes {
	const char *uuid;
	struct nbd_uri uri;
	uint64_t end;			/* in bytes, whole blocks */
	uint64_t offset;		/* up to where the server has told */
	uint64_t start;			/* of the hole that ends at offset, if any */
	char message[MESSAGE_BYTES];	/* for the kernel, not yet sent */
	size_t length;
	int err;
};

static void send_message(struct holes *holes)
{
	if (holes->length && !holes->err)
		holes->err = dm_send(holes->uuid, holes->message);
	holes->length = 0;
}

/* What is zero from start to offset ends there: its whole blocks are a hole. */
static void end_hole(struct holes *holes)
{
	uint64_t first = count_blocks(holes->start);
	uint64_t end = (holes->offset < holes->end ? holes->offset : holes->end) / BLOCK_BYTES;

	if (first < end) {
		if (!holes->length)
			holes->length = sprintf(holes->message, "holes");
		holes->length += sprintf(holes->message + holes->length, " %" PRIu64 " %" PRIu64,
					 first, end - first);
		if (holes->length + 48 > sizeof(holes->message))
			send_message(holes);
	}
	holes->start = UINT64_MAX;
}

/* Called with pairs of a length and flags. */
static int add_extents(void *arg, const char *context, uint64_t offset, uint32_t *entries,
		       size_t n, int *error)
{
	struct holes *holes = arg;

	(void)error;
	if (strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) || offset != holes->offset)
		return 0;
	for (size_t i = 0; i + 1 < n; i += 2) {
		bool zero = entries[i + 1] & LIBNBD_STATE_ZERO;

		if (zero && holes->start == UINT64_MAX)
			holes->start = holes->offset;
		else if (!zero && holes->start != UINT64_MAX)
			end_hole(holes);
		holes->offset += entries[i];
	}
	return 0;
}

static int connect_server(struct nbd_handle *handle, const struct nbd_uri *uri)
{
	if (nbd.set_export_name(handle, uri->export) ||
	    nbd.add_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION))
		return -EIO;
	return uri->socket[0] ? nbd.connect_unix(handle, uri->socket) :
	       nbd.connect_tcp(handle, uri->host, uri->port);
}

static int learn(struct holes *holes)
{
	nbd_extent_callback callback = { .callback = add_extents, .user_data = holes };
	struct nbd_handle *handle = nbd.create();
	int64_t size;

	alarm(ANSWER_S);
	if (!handle || connect_server(handle, &holes->uri))
		return -EIO;
	if (nbd.can_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION) != 1)
		return 0;
	size = nbd.get_size(handle);
	if (size < 0)
		return -EIO;
	if (holes->end > (uint64_t)size)
		holes->end = size - size % BLOCK_BYTES;
	while (holes->offset < holes->end && !holes->err) {
		uint64_t before = holes->offset, left = size - before;
		uint64_t bytes = left < REQUEST_BYTES ? left : REQUEST_BYTES;

		alarm(ANSWER_S);
		if (nbd.block_status(handle, bytes, before, callback, 0) ||
		    holes->offset == before)
			return -EIO;
	}
	if (holes->start != UINT64_MAX)
		end_hole(holes);
	send_message(holes);
	nbd.shutdown(handle, 0);
	return holes->err;
}

/* Runs in a process of its own, which takes along what it leaves open. */
static void work(void *arg, int ready_fd)
{
	helper_ready(ready_fd, load_libnbd() ? learn(arg) : -ENOPKG);
}

/*
 * Learns the holes of the base at @text, where that is an NBD server, and tells them
 * to the device @uuid on it. They only save work, so not to know them is no failure.
 */
void holes_start(const char *mangled, const char *uuid, const char *text, uint64_t base_bytes)
{
	struct holes holes = {
		.uuid = uuid, .end = base_bytes - base_bytes % BLOCK_BYTES,
		.start = UINT64_MAX,
	};
	struct nbd_link link;
	int err;

	/* as it was written down, to hold in any directory */
	if (!nbd_find(mangled, &link))
		text = link.uri;
	if (parse_nbd_uri(text, &holes.uri))
		return;
	err = helper_start(mangled, KIND, text, work, &holes, WAIT_MS);
	if (err == -ENOPKG)
		warn("the holes of %s stay unknown: the package libnbd0 is missing", text);
	else if (err && err != -ETIMEDOUT)
		warn("the holes of %s stay unknown: its server does not tell them", text);
}

void holes_stop(const char *mangled)
{
	helper_stop(mangled, KIND);
}
