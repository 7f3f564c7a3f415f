// SPDX-License-Identifier: GPL-2.0-only
/*
 * What user space sees: the table line, the status line, the messages.
 */
#include <linux/ctype.h>
#include <linux/kstrtox.h>

#include "compat.h"
#include "nbdcow.h"

#define DM_MSG_PREFIX "nbdcow"

/**
 * nbdcow_parse_limit() - parse the argument of `limit'
 * @arg: a number of blocks, at least 1
 * @limit: set on success
 *
 * Context: any.
 * Return: 0 or -EINVAL.
 */
int nbdcow_parse_limit(const char *arg, unsigned long *limit)
{
	unsigned long value;

	if (!isdigit(*arg) || kstrtoul(arg, 10, &value) || !value ||
	    value > LONG_MAX)
		return -EINVAL;
	*limit = value;
	return 0;
}

/**
 * nbdcow_decode_path() - undo the %XX encoding of a path, in place
 * @path: the path as it stands in a table line
 *
 * Device-mapper splits lines at blanks, and libdevmapper doubles backslashes,
 * so neither gets through as it is.
 *
 * Context: any.
 * Return: 0 or -EINVAL.
 */
int nbdcow_decode_path(char *path)
{
	char *to = path;

	for (; *path; path++) {
		if (*path == '%') {
			u8 byte;

			if (hex2bin(&byte, path + 1, 1) || !byte)
				return -EINVAL;
			*to++ = byte;
			path += 2;
		} else {
			*to++ = *path;
		}
	}
	*to = '\0';
	return 0;
}

static void emit_path(const char *path, char *result, unsigned int maxlen,
		      unsigned int *size)
{
	unsigned int sz = *size;

	for (; *path; path++) {
		/* The kernel's isgraph() knows Latin-1; this is ASCII. */
		if (isascii(*path) && isgraph(*path) && *path != '\\' &&
		    *path != '%')
			DMEMIT("%c", *path);
		else
			DMEMIT("%%%02X", (u8)*path);
	}
	*size = sz;
}

static unsigned int emit_table(struct nbdcow_target *t, char *result,
			       unsigned int maxlen)
{
	const char *dir = t->overlay->tmpfs_dir;
	unsigned long limit = READ_ONCE(t->limit);
	unsigned int sz = 0;

	DMEMIT("%s %u", t->base->name,
	       (limit != NBDCOW_NO_LIMIT ? 2 : 0) + (dir ? 2 : 0));
	if (limit != NBDCOW_NO_LIMIT)
		DMEMIT(" limit %lu", limit);
	if (dir) {
		DMEMIT(" tmpfs ");
		emit_path(dir, result, maxlen, &sz);
	}
	return sz;
}

static const char *health(struct nbdcow_target *t)
{
	if (READ_ONCE(t->base_failed) ||
	    bdev_nr_sectors(t->base->bdev) < t->overlay->base_sectors)
		return "base-error";

	switch (nbdcow_overlay_level(t->overlay)) {
	case NBDCOW_FULL:
		return "full";
	case NBDCOW_HIGH:
		return "high";
	default:
		return "ok";
	}
}

static unsigned int emit_info(struct nbdcow_target *t, char *result,
			      unsigned int maxlen)
{
	struct nbdcow_overlay *ov = t->overlay;
	unsigned long limit = READ_ONCE(ov->limit);
	long used, zeroed, peak, refused, errors;
	struct nbdcow_layer *layer;
	unsigned int sz = 0;
	size_t metadata;

	rcu_read_lock();
	layer = rcu_dereference(ov->layer);
	used = atomic_long_read(&layer->used);
	zeroed = atomic_long_read(&layer->map->zeroed);
	metadata = nbdcow_map_bytes(layer->map);
	rcu_read_unlock();
	peak = atomic_long_read(&ov->peak);
	refused = atomic_long_read(&ov->refused);
	errors = atomic_long_read(&ov->base_errors);

	DMEMIT("%s %ld/", health(t), used);
	if (limit == NBDCOW_NO_LIMIT)
		DMEMIT("-");
	else
		DMEMIT("%lu", limit);
	DMEMIT(" %ld %ld %zu %ld %ld", peak, zeroed, metadata, refused, errors);
	return sz;
}

/**
 * nbdcow_status() - status, table and measurement lines
 * @ti: the target
 * @type: which of them
 * @status_flags: unused; a status needs no flush
 * @result: buffer
 * @maxlen: its size in bytes
 *
 * Context: process context.
 */
void nbdcow_status(struct dm_target *ti, status_type_t type,
		   unsigned int status_flags, char *result, unsigned int maxlen)
{
	struct nbdcow_target *t = ti->private;
	unsigned int sz = 0;

	switch (type) {
	case STATUSTYPE_INFO:
		emit_info(t, result, maxlen);
		break;
	case STATUSTYPE_TABLE:
		emit_table(t, result, maxlen);
		break;
	case STATUSTYPE_IMA:
		DMEMIT_TARGET_NAME_VERSION(ti->type);
		DMEMIT(",base_device_name=%s;", t->base->name);
		break;
	}
}

/*
 * Messages
 */

static const char *device_name(struct nbdcow_target *t)
{
	return dm_table_device_name(t->ti->table);
}

static int message_reset(struct nbdcow_target *t, char **argv)
{
	int ret = nbdcow_overlay_reset(t->overlay);

	if (ret)
		DMERR("%s: reset failed (error %d)", device_name(t), ret);
	return ret;
}

static int message_limit(struct nbdcow_target *t, char **argv)
{
	unsigned long limit = NBDCOW_NO_LIMIT;

	if (strcasecmp(argv[1], "none") && nbdcow_parse_limit(argv[1], &limit)) {
		DMERR("%s: limit: expected a number of 4 KiB blocks or none, got %s",
		      device_name(t), argv[1]);
		return -EINVAL;
	}
	WRITE_ONCE(t->limit, limit);
	nbdcow_overlay_set_limit(t->overlay, limit);
	return 0;
}

static const struct {
	const char *name;
	unsigned int argc;	/* with the name */
	int (*handle)(struct nbdcow_target *t, char **argv);
} messages[] = {
	{ "reset", 1, message_reset },
	{ "limit", 2, message_limit },
};

/**
 * nbdcow_message() - carry a message out
 * @ti: the target
 * @argc: number of words
 * @argv: words
 * @result: unused
 * @maxlen: unused
 *
 * Context: process context, sleeps.
 * Return: 0; -EINVAL for an unknown message or bad arguments; else as the
 *	message's own action.
 */
int nbdcow_message(struct dm_target *ti, unsigned int argc, char **argv,
		   char *result, unsigned int maxlen)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(messages); i++) {
		if (strcasecmp(argv[0], messages[i].name))
			continue;
		if (argc != messages[i].argc) {
			DMERR("%s: message %s takes %u arguments, got %u",
			      device_name(ti->private), argv[0],
			      messages[i].argc - 1, argc - 1);
			return -EINVAL;
		}
		return messages[i].handle(ti->private, argv);
	}
	DMERR("%s: unknown message %s: expected reset or limit",
	      device_name(ti->private), argv[0]);
	return -EINVAL;
}
