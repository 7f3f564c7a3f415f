// SPDX-License-Identifier: GPL-2.0-only
/*
 * Devices for the partitions of a device, made by kpartx as NAMEp1 and so on.
 * Device-mapper knows them by the UUID of the device they are a part of.
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cowctl.h"

#define TIMEOUT_MS	60000

/* Return: whether the mapped device in this directory is a partition of @uuid's. */
static bool is_part(const char *dir, const char *uuid)
{
	char *file = xasprintf("%s/dm/uuid", dir), text[2 * NAME_BYTES];
	int used = 0;
	bool part = !read_line(file, text, sizeof(text)) &&
		    !sscanf(text, "part%*u-%n", &used) && used && !strcmp(text + used, uuid);

	free(file);
	return part;
}

/* Return: how many partitions have devices, in *@parts (to be freed). */
int parts_find(const struct cow *cow, struct part **parts)
{
	char *path = xasprintf("/sys/dev/block/%u:%u/holders", cow->major, cow->minor);
	DIR *dir = opendir(path);
	struct dirent *entry;
	int n = 0;

	*parts = NULL;
	while (dir && (entry = readdir(dir))) {
		char *holder = xasprintf("%s/%s", path, entry->d_name);
		char *file = xasprintf("%s/dev", holder), text[24];
		struct part part, *more = NULL;

		if (is_part(holder, cow->uuid) && !read_line(file, text, sizeof(text)) &&
		    sscanf(text, "%u:%u", &part.major, &part.minor) == 2)
			more = realloc(*parts, (n + 1) * sizeof(part));
		if (more) {
			more[n++] = part;
			*parts = more;
		}
		free(file);
		free(holder);
	}
	if (dir)
		closedir(dir);
	free(path);
	return n;
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
	return fail(-EIO, "kpartx fails for %s: %s", path,
		    kpartx.message[0] ? kpartx.message : "no reason given");
}

/* Makes, changes and removes devices, until they are as the partitions are now. */
int parts_map(const char *path)
{
	return kpartx("-u", path, false);
}

int parts_unmap(const char *path)
{
	return kpartx("-d", path, true);
}
