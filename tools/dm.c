// SPDX-License-Identifier: GPL-2.0-only
/*
 * The mapped devices themselves, through libdevmapper. Names come in mangled
 * (see mangle_name()), which libdevmapper recognises and leaves alone.
 *
 * A device of ours has a UUID that begins with NBDCOW-. Creating one takes
 * three ioctls, so a killed cowctl can leave a device of that kind without a
 * table; whoever comes next may take it away (COW_HALF_MADE).
 */
#include <errno.h>
#include <fcntl.h>
#include <libdevmapper.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cowctl.h"

#define TARGET		"nbdcow"
#define MODULE		"dm-nbdcow"
#define UUID_PREFIX	"NBDCOW-"

/* libdevmapper's own messages do not know what the user asked for. */
static void __attribute__((format(printf, 5, 6)))
no_log(int level, const char *file, int line, int dm_errno, const char *fmt, ...)
{
	(void)level;
	(void)file;
	(void)line;
	(void)dm_errno;
	(void)fmt;
}

void dm_init(void)
{
	dm_log_with_errno_init(no_log);
}

/* Return: a task that can be run, or NULL when there is no memory or no dm. */
static struct dm_task *task_new(int type, const char *mangled)
{
	struct dm_task *task = dm_task_create(type);

	if (task && mangled && !dm_task_set_name(task, mangled)) {
		dm_task_destroy(task);
		task = NULL;
	}
	return task;
}

static int task_run(struct dm_task *task)
{
	char version[32];

	if (!task)
		return dm_driver_version(version, sizeof(version)) ? -ENOMEM : -ENOPKG;
	if (dm_task_run(task))
		return 0;
	return dm_task_get_errno(task) ? -dm_task_get_errno(task) : -EIO;
}

static int fail_query(int err, const char *about)
{
	if (err == -ENOPKG)
		return fail(err, "this kernel has no device-mapper");
	return fail(err, "cannot ask device-mapper for %s: %s", about, strerror(-err));
}

/* Return: 1 when the kernel has the target, 0 when not, -errno. */
static int target_known(void)
{
	struct dm_task *task = task_new(DM_DEVICE_LIST_VERSIONS, NULL);
	struct dm_versions *v, *last = NULL;
	int ret = task_run(task);

	if (!ret) {
		for (v = dm_task_get_versions(task); v && v != last && !ret;
		     last = v, v = (void *)((char *)v + v->next))
			ret = !strcmp(v->name, TARGET);
	}
	if (task)
		dm_task_destroy(task);
	return ret;
}

static int modprobe(const char *module)
{
	const char *argv[] = { "modprobe", "-q", module, NULL };
	struct run modprobe = {
		.argv = argv, .package = "kmod", .timeout_ms = 60000, .keep_fd = -1,
	};

	return run(&modprobe);
}

/* Loads the module where it is not loaded yet. */
int dm_need_target(void)
{
	int known = target_known();
	int ret;

	if (known == 1)
		return 0;
	if (known < 0) {
		ret = modprobe("dm-mod");
		if (ret < 0)
			return ret;
	}
	ret = modprobe(MODULE);
	if (ret < 0)
		return ret;
	known = target_known();
	if (known < 0)
		return fail_query(-ENOPKG, TARGET);
	if (!known)
		return fail(-ENOPKG, "the kernel module " MODULE
			    " is not loaded and cannot be; install it for this kernel");
	return 0;
}

/* Runs a query that answers with one target. @params is valid until task_destroy. */
static int query(int type, unsigned int major, unsigned int minor, struct dm_task **task,
		 const char **target, char **params, uint64_t *sectors)
{
	uint64_t start;
	char *type_name = NULL;
	int err;

	*task = task_new(type, NULL);
	if (*task && (!dm_task_set_major(*task, major) || !dm_task_set_minor(*task, minor)))
		return -ENOMEM;
	err = task_run(*task);
	if (err)
		return err;
	dm_get_next_target(*task, NULL, &start, sectors, &type_name, params);
	*target = type_name ? type_name : "";
	return 0;
}

static int read_table(struct cow *cow)
{
	struct dm_task *task;
	const char *target;
	char *params;
	int err = query(DM_DEVICE_TABLE, cow->major, cow->minor, &task, &target, &params,
			&cow->sectors);

	if (!err && strcmp(target, TARGET))
		cow->state = COW_FOREIGN;
	else if (!err)
		err = parse_table(params, &cow->table);
	if (task)
		dm_task_destroy(task);
	return err;
}

static int read_status(struct cow *cow)
{
	struct dm_task *task;
	const char *target;
	char *params;
	uint64_t sectors;
	int err = query(DM_DEVICE_STATUS, cow->major, cow->minor, &task, &target, &params,
			&sectors);

	if (!err)
		err = strcmp(target, TARGET) ? -ENODEV : parse_status(params, &cow->status);
	if (task)
		dm_task_destroy(task);
	return err;
}

/* Runs @task, a DM_DEVICE_INFO, and fills @cow with all there is to know. */
static int find(struct dm_task *task, struct cow *cow)
{
	char *mangled, *plain;
	struct dm_info info;
	int err;

	memset(cow, 0, sizeof(*cow));
	err = task_run(task);
	if (err)
		return err == -ENXIO ? -ENODEV : err;
	if (!dm_task_get_info(task, &info) || !info.exists)
		return -ENODEV;
	mangled = dm_task_get_name_mangled(task);
	snprintf(cow->mangled, sizeof(cow->mangled), "%s", mangled ?: dm_task_get_name(task));
	plain = dm_task_get_name_unmangled(task);
	snprintf(cow->name, sizeof(cow->name), "%s",
		 plain && printable(plain) ? plain : cow->mangled);
	snprintf(cow->path, sizeof(cow->path), "%s/%s", dm_dir(), cow->mangled);
	free(mangled);
	free(plain);
	cow->major = info.major;
	cow->minor = info.minor;
	cow->open_count = info.open_count;
	if (!info.live_table) {
		bool ours = !strncmp(dm_task_get_uuid(task), UUID_PREFIX, strlen(UUID_PREFIX));

		cow->state = ours ? COW_HALF_MADE : COW_FOREIGN;
		return 0;
	}
	err = read_table(cow);
	if (!err && cow->state == COW_LIVE)
		err = read_status(cow);
	return err == -ENXIO ? -ENODEV : err;
}

/* Return: -ENODEV, in silence, when there is no device of that name. */
int dm_find(const char *mangled, struct cow *cow)
{
	struct dm_task *task = task_new(DM_DEVICE_INFO, mangled);
	int err = find(task, cow);

	if (task)
		dm_task_destroy(task);
	if (err && err != -ENODEV)
		fail_query(err, mangled);
	/* Where no udev makes nodes, a create that was killed may have made none. */
	if (!err && cow->state == COW_LIVE && !dm_udev_get_sync_support() &&
	    access(cow->path, F_OK))
		dm_mknodes(cow->mangled);
	return err;
}

int dm_find_number(unsigned int major, unsigned int minor, struct cow *cow)
{
	struct dm_task *task = task_new(DM_DEVICE_INFO, NULL);
	char number[24];
	int err;

	if (task && (!dm_task_set_major(task, major) || !dm_task_set_minor(task, minor)))
		err = -ENOMEM;
	else
		err = find(task, cow);
	if (task)
		dm_task_destroy(task);
	snprintf(number, sizeof(number), "%u:%u", major, minor);
	if (err && err != -ENODEV)
		fail_query(err, number);
	return err;
}

/* Calls @call for every live device of our target, until it returns an error. */
int dm_each(int (*call)(const struct cow *cow, void *arg), void *arg)
{
	struct dm_task *task = task_new(DM_DEVICE_LIST, NULL);
	int err = task_run(task);
	struct dm_names *names;
	struct cow cow;

	if (err) {
		fail_query(err, "its devices");
		goto out;
	}
	names = dm_task_get_names(task);
	while (names && names->dev && !err) {
		err = dm_find_number(major(names->dev), minor(names->dev), &cow);
		if (err == -ENODEV)
			err = 0;	/* removed meanwhile */
		else if (!err && cow.state == COW_LIVE)
			err = call(&cow, arg);
		if (!names->next)
			break;
		names = (void *)((char *)names + names->next);
	}
out:
	if (task)
		dm_task_destroy(task);
	return err;
}

/*
 * The kernel tells only its log why it refused a table. Return: that reason,
 * among what was logged since @kmsg was opened, or what @err says.
 */
static const char *reason(int kmsg, int err, char *text, size_t size)
{
	ssize_t n;

	while (kmsg >= 0 && ((n = read(kmsg, text, size - 1)) > 0 || (n < 0 && errno == EPIPE))) {
		char *found;

		if (n < 0)
			continue;	/* the log has gone on so far that some is lost */
		text[n] = '\0';
		found = table_error(text);
		if (found)
			return found;
	}
	return strerror(-err);
}

static int set_uuid(struct dm_task *task)
{
	unsigned char random[16];
	char uuid[sizeof(UUID_PREFIX) + 2 * sizeof(random)] = UUID_PREFIX;

	if (getrandom(random, sizeof(random), 0) != sizeof(random))
		return 0;
	for (size_t i = 0; i < sizeof(random); i++)
		sprintf(uuid + strlen(UUID_PREFIX) + 2 * i, "%02x", random[i]);
	return dm_task_set_uuid(task, uuid);
}

/* Makes the device, its table and its node; on failure nothing is left. */
int dm_create(const struct args *args, uint64_t sectors, const char *params)
{
	struct dm_task *task = task_new(DM_DEVICE_CREATE, args->mangled);
	int kmsg = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	uint32_t cookie = 0;
	char text[8192];
	int err;

	if (kmsg >= 0)
		lseek(kmsg, 0, SEEK_END);
	if (!task || !set_uuid(task) || !dm_task_add_target(task, 0, sectors, TARGET, params) ||
	    !dm_task_set_cookie(task, &cookie, 0)) {
		err = -ENOMEM;
	} else {
		err = task_run(task);
		dm_udev_wait(cookie);
	}
	if (task)
		dm_task_destroy(task);
	if (err)
		/* -EINVAL is for what the user typed wrong; this is not known to be. */
		err = fail(err == -EINVAL ? -EIO : err, "cannot create %s: %s", args->name,
			   reason(kmsg, err, text, sizeof(text)));
	if (kmsg >= 0)
		close(kmsg);
	return err;
}

int dm_remove(const struct args *args)
{
	struct dm_task *task = task_new(DM_DEVICE_REMOVE, args->mangled);
	uint32_t cookie = 0;
	int err = -ENOMEM;

	/* Retried for a while, because udev may look at it just now. */
	if (task && dm_task_retry_remove(task) && dm_task_set_cookie(task, &cookie, 0)) {
		err = task_run(task);
		dm_udev_wait(cookie);
	}
	if (task)
		dm_task_destroy(task);
	if (err)
		fail(err, "cannot remove %s: %s", args->name, strerror(-err));
	return err;
}

int dm_message(const struct args *args, const char *message)
{
	struct dm_task *task = task_new(DM_DEVICE_TARGET_MSG, args->mangled);
	int err = -ENOMEM;

	if (task && dm_task_set_sector(task, 0) && dm_task_set_message(task, message))
		err = task_run(task);
	if (task)
		dm_task_destroy(task);
	if (err)
		err = fail(err == -EINVAL ? -EIO : err, "the kernel refuses \"%s\" for %s: %s",
			   message, args->name, strerror(-err));
	return err;
}
