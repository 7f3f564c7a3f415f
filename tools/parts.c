// SPDX-License-Identifier: GPL-2.0-only
/*
 * Devices for the partitions of a device, made by kpartx as NAMEp1 and so on.
 * Device-mapper knows them by the UUID of the device they are a part of.
 */
#include <blkid/blkid.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "cowctl.h"

#define TIMEOUT_MS	60000

struct search {
	const char *uuid;
	struct part *parts;
	int n;
};

/* Return: whether @uuid is "part<number>-" and then @whole. */
static bool is_part(const char *uuid, const char *whole)
{
	const char *end;

	if (strncmp(uuid, "part", 4))
		return false;
	end = uuid + 4 + strspn(uuid + 4, "0123456789");
	return end > uuid + 4 && *end == '-' && !strcmp(end + 1, whole);
}

static bool add_part(const char *name, dev_t dev, void *arg)
{
	char *file = xasprintf("/sys/dev/block/%u:%u/dm/uuid", major(dev), minor(dev));
	char text[2 * NAME_BYTES];
	struct search *search = arg;
	struct part *more = NULL;

	(void)name;
	if (!read_line(file, text, sizeof(text)) && is_part(text, search->uuid))
		more = realloc(search->parts, (search->n + 1) * sizeof(*more));
	if (more) {
		more[search->n++] = (struct part){ .major = major(dev), .minor = minor(dev) };
		search->parts = more;
	}
	free(file);
	return false;
}

/* Return: how many partitions have devices; in *@parts (to be freed), unless it is NULL. */
int parts_find(const struct cow *cow, struct part **parts)
{
	struct search search = { .uuid = cow->uuid };

	any_link(makedev(cow->major, cow->minor), "holders", add_part, &search);
	if (parts)
		*parts = search.parts;
	else
		free(search.parts);
	return search.n;
}

static int kpartx(const char *what, const char *path, bool finish)
{
	const char *argv[] = { "kpartx", what, "-s", "-p", "p", path, NULL };
	struct run kpartx = {
		.argv = argv, .package = "kpartx", .timeout_ms = TIMEOUT_MS, .keep_fd = -1,
		.finish = finish,
	};
	int err = run(&kpartx);

	if (err <= 0)
		return err;
	return fail(-EIO, "kpartx fails for %s: %s", path, kpartx.message[0] ? kpartx.message :
		    strcmp(what, "-d") ? "no reason given" : "a partition is in use");
}

/* Return: -ENODATA when the device has no partition. */
static int look_for_partition(void *path)
{
	blkid_probe probe = blkid_new_probe_from_filename(path);
	blkid_partlist list = NULL;
	bool none;

	if (!probe)
		return -EIO;
	if (!blkid_probe_enable_partitions(probe, 1))
		list = blkid_probe_get_partitions(probe);
	none = !list || !blkid_partlist_numof_partitions(list);
	blkid_free_probe(probe);
	return none ? -ENODATA : 0;
}

/*
 * Makes, changes and removes devices, until they are as the partitions are now; with
 * @finish, whoever wants us to stop.
 */
int parts_map(const char *path, bool finish)
{
	/* kpartx removes none where there is no table, but may know one that we do not. */
	if (call_apart(look_for_partition, (void *)path, TIMEOUT_MS, false) == -ENODATA) {
		int err = kpartx("-d", path, finish);

		if (err)
			return err;
	}
	return kpartx("-u", path, finish);
}

int parts_unmap(const char *path)
{
	return kpartx("-d", path, true);
}

/*
 * parts_map() after @what was done to the device, which stands whatever comes of it, or has
 * failed. Return: @err, with which it ended.
 */
int parts_renew(const struct cow *cow, const char *what, int err)
{
	if (parts_map(cow->path, true) && !err)
		warn("%s was %s, but the devices are not those of its partitions; "
		     "\"cowctl set %s partitions=true\" makes them so", cow->name, what,
		     cow->name);
	return err;
}
