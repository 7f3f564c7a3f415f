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
#include <inttypes.h>
#include <libdevmapper.h>
#include <linux/dm-ioctl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <ucontext.h>
#include <unistd.h>

#include "cowctl.h"

#define TARGET		"nbdcow"
#define MODULE		"dm-nbdcow"
#define UUID_PREFIX	"NBDCOW-"
#define SERVER_PREFIX	UUID_PREFIX "SERVER-"
#define UUID_BYTES	129

/*
 * What udev shall not do with the devices of a server: look for volumes, RAID
 * members and the like in what its clients have written, or even start them.
 * Nodes are not made by libdevmapper either, so that none can be left over.
 */
#define SERVER_UDEV	(DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG | DM_UDEV_DISABLE_DISK_RULES_FLAG | \
			 DM_UDEV_DISABLE_OTHER_RULES_FLAG | DM_UDEV_DISABLE_LIBRARY_FALLBACK)

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
	if (err == -EINVAL)
		return fail(-ENOPKG, "%s: cowctl and the kernel module " MODULE
			    " are not of the same version", about);
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

/* Loads the module where it is not loaded yet. */
int dm_need_target(void)
{
	int known = target_known();
	char message[512];
	int ret;

	if (known == 1)
		return 0;
	if (known < 0) {
		ret = load_module("dm-mod", message);
		if (ret < 0)
			return ret;
	}
	ret = load_module(MODULE, message);
	if (ret < 0)
		return ret;
	known = target_known();
	if (known < 0)
		return fail_query(-ENOPKG, TARGET);
	if (!known && *message)
		return fail(-ENOPKG, "cannot load the kernel module " MODULE ": %s", message);
	if (!known)
		return fail(-ENOPKG, "the kernel module " MODULE
			    " is not loaded and cannot be; install it for this kernel");
	return 0;
}

static struct dm_task *task_for_uuid(int type, const char *uuid)
{
	struct dm_task *task = task_new(type, NULL);

	if (task && !dm_task_set_uuid(task, uuid)) {
		dm_task_destroy(task);
		task = NULL;
	}
	return task;
}

static struct dm_task *task_for_number(int type, unsigned int major, unsigned int minor)
{
	struct dm_task *task = task_new(type, NULL);

	if (task && (!dm_task_set_major(task, major) || !dm_task_set_minor(task, minor))) {
		dm_task_destroy(task);
		task = NULL;
	}
	return task;
}

/* Runs a query that answers with one target. @params is valid until task_destroy. */
static int query(int type, unsigned int major, unsigned int minor, struct dm_task **task,
		 const char **target, char **params, uint64_t *sectors)
{
	uint64_t start;
	char *type_name = NULL;
	int err;

	*task = task_for_number(type, major, minor);
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
	else if (!err && snprintf(cow->params, sizeof(cow->params), "%s", params) >=
		 (int)sizeof(cow->params))
		err = -ENAMETOOLONG;
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
	snprintf(cow->uuid, sizeof(cow->uuid), "%s", dm_task_get_uuid(task));
	cow->major = info.major;
	cow->minor = info.minor;
	cow->open_count = info.open_count;
	if (!info.live_table) {
		bool ours = !strncmp(cow->uuid, UUID_PREFIX, strlen(UUID_PREFIX));

		cow->state = ours ? COW_HALF_MADE : COW_FOREIGN;
		return 0;
	}
	err = read_table(cow);
	if (!err && cow->state == COW_FOREIGN &&
	    !strncmp(cow->uuid, SERVER_PREFIX, strlen(SERVER_PREFIX)))
		cow->state = COW_VIEW;
	if (!err && cow->state == COW_LIVE)
		err = read_status(cow);
	return err == -ENXIO ? -ENODEV : err;
}

/* Where no udev sees to the nodes, a command that was killed may have left that out. */
static void repair_node(const char *mangled, bool wanted)
{
	char *path = xasprintf("%s/%s", dm_dir(), mangled);

	/* Asks the kernel again, so it does no harm to what was made meanwhile. */
	if (!dm_udev_get_sync_support() && wanted == !!access(path, F_OK)) {
		dm_mknodes(mangled);
		/* now, not at exit: it may be opened next */
		dm_task_update_nodes();
	}
	free(path);
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
	if (err == -ENODEV || (!err && cow->state == COW_LIVE))
		repair_node(mangled, !err);
	return err;
}

int dm_find_number(unsigned int major, unsigned int minor, struct cow *cow)
{
	struct dm_task *task = task_for_number(DM_DEVICE_INFO, major, minor);
	int err = find(task, cow);
	char number[24];

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

/* A UUID that begins with @prefix. */
static int make_uuid(const char *prefix, char uuid[UUID_BYTES])
{
	uint64_t random[2];

	if (getrandom(random, sizeof(random), 0) != sizeof(random))
		return -EIO;
	snprintf(uuid, UUID_BYTES, "%s%016" PRIx64 "%016" PRIx64, prefix, random[0], random[1]);
	return 0;
}

/* Return: the kernel's log, to be read from here on, or -1. */
static int open_log(void)
{
	int kmsg = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	if (kmsg >= 0)
		lseek(kmsg, 0, SEEK_END);
	return kmsg;
}

/* Makes a device and, unless @sectors is 0, its table; on failure nothing is left. */
static int create(const char *mangled, const char *name, const char *prefix, uint16_t udev_flags,
		  uint64_t sectors, const char *params)
{
	struct dm_task *task = task_new(DM_DEVICE_CREATE, mangled);
	char uuid[UUID_BYTES], text[8192];
	int kmsg = open_log();
	uint32_t cookie = 0;
	int err = make_uuid(prefix, uuid);

	if (!err && (!task || !dm_task_set_uuid(task, uuid) ||
		     (sectors && !dm_task_add_target(task, 0, sectors, TARGET, params)) ||
		     !dm_task_set_cookie(task, &cookie, udev_flags)))
		err = -ENOMEM;
	if (!err) {
		err = task_run(task);
		dm_udev_wait(cookie);
	}
	if (task)
		dm_task_destroy(task);
	if (err)
		/* -EINVAL is for what the user typed wrong; this is not known to be. */
		err = fail(err == -EINVAL ? -EIO : err, "cannot create %s: %s", name,
			   reason(kmsg, err, text, sizeof(text)));
	if (kmsg >= 0)
		close(kmsg);
	return err;
}

/* Makes the device, its table and its node; on failure nothing is left. */
int dm_create(const struct args *args, uint64_t sectors, const char *params)
{
	return create(args->mangled, args->name, UUID_PREFIX, 0, sectors, params);
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

/* Sends a message with @task, which it frees; @answer may be NULL, else is to be freed. */
static int send(struct dm_task *task, const char *message, char **answer)
{
	const char *text;
	int err = -ENOMEM;

	if (task && dm_task_set_sector(task, 0) && dm_task_set_message(task, message))
		err = task_run(task);
	if (!err && answer) {
		text = dm_task_get_message_response(task);
		*answer = text ? strdup(text) : NULL;
		if (!*answer)
			err = -ENODATA;
	}
	if (task)
		dm_task_destroy(task);
	return err;
}

int dm_message(const struct args *args, const char *message)
{
	int err = send(task_new(DM_DEVICE_TARGET_MSG, args->mangled), message, NULL);

	return err ? fail(err == -EINVAL ? -EIO : err, "the kernel refuses \"%s\" for %s: %s",
			  message, args->name, strerror(-err)) : 0;
}

/* The signal ends a system call, and is held back from then on, as it was before. */
static void interrupt_once(int signal, siginfo_t *info, void *context)
{
	ucontext_t *interrupted_at = context;

	(void)info;
	sigaddset(&interrupted_at->uc_sigmask, signal);
	raise(signal);
}

/*
 * Runs @task, which may have to wait for a base that does not answer. Signals that
 * ask us to stop end the wait, and stay pending.
 */
static int run_interruptible(struct dm_task *task)
{
	static const int signals[] = { SIGINT, SIGTERM, SIGHUP };
	struct sigaction before[3], action = {
		.sa_sigaction = interrupt_once, .sa_flags = SA_SIGINFO,
	};
	sigset_t set, mask;
	int err = -EINTR;

	/* With a handler, one that is ignored would no more be. */
	stop_signals(&set);
	for (int i = 0; i < 3; i++)
		if (sigismember(&set, signals[i]))
			sigaction(signals[i], &action, &before[i]);
	sigprocmask(SIG_UNBLOCK, &set, &mask);
	if (!interrupted())
		err = task_run(task);
	sigprocmask(SIG_SETMASK, &mask, NULL);
	for (int i = 0; i < 3; i++)
		if (sigismember(&set, signals[i]))
			sigaction(signals[i], &before[i], NULL);
	return err;
}

/*
 * Neither requests nor file systems are flushed: those that wait for the base
 * must go on with the new table instead of failing now. With @finish it goes on,
 * whoever wants us to stop.
 */
static int resume(const char *mangled, bool finish)
{
	struct dm_task *task = task_new(DM_DEVICE_RESUME, mangled);
	uint32_t cookie = 0;
	int err = -ENOMEM;

	if (task && dm_task_no_flush(task) && dm_task_skip_lockfs(task) &&
	    dm_task_set_cookie(task, &cookie, 0)) {
		err = finish ? task_run(task) : run_interruptible(task);
		dm_udev_wait(cookie);
	}
	if (task)
		dm_task_destroy(task);
	return err;
}

/* Drops a table that was loaded and never used. */
void dm_clear(const char *mangled)
{
	struct dm_task *task = task_new(DM_DEVICE_CLEAR, mangled);

	task_run(task);
	if (task)
		dm_task_destroy(task);
}

/*
 * Gives a live device another table; on failure it keeps the one it has. With @finish it
 * undoes something, and signals do not stop it.
 */
int dm_reload(const struct cow *cow, uint64_t sectors, const char *params, bool finish)
{
	struct dm_task *task = task_new(DM_DEVICE_RELOAD, cow->mangled);
	int kmsg = open_log(), err = -ENOMEM;
	char text[8192];

	if (task && dm_task_add_target(task, 0, sectors, TARGET, params))
		err = task_run(task);
	if (task)
		dm_task_destroy(task);
	if (!err) {
		err = resume(cow->mangled, finish);
		if (err) {
			dm_clear(cow->mangled);
			resume(cow->mangled, true);
		}
	}
	if (err && err != -EINTR)
		err = fail(err == -EINVAL ? -EIO : err, "cannot change %s: %s", cow->name,
			   reason(kmsg, err, text, sizeof(text)));
	if (kmsg >= 0)
		close(kmsg);
	return err;
}

/* A message, in silence, to no other device than this one, whatever its name. */
int dm_send(const char *uuid, const char *message)
{
	return send(task_for_uuid(DM_DEVICE_TARGET_MSG, uuid), message, NULL);
}

bool dm_exists(const char *uuid)
{
	struct dm_task *task = task_for_uuid(DM_DEVICE_INFO, uuid);
	struct dm_info info = { 0 };
	int err = task_run(task);

	/* What cannot be asked may still be there. */
	if (!err && dm_task_get_info(task, &info) && !info.exists)
		err = -ENXIO;
	if (task)
		dm_task_destroy(task);
	return err != -ENXIO;
}

/* Return: a descriptor that polls readable after the next event of any device. */
int dm_events(void)
{
	int fd = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

/* Only what happens from here on counts as the next event. */
int dm_arm_events(int fd)
{
	struct dm_ioctl ioctl_data = {
		.version = { DM_VERSION_MAJOR, 0, 0 },
		.data_size = sizeof(ioctl_data),
		.data_start = sizeof(ioctl_data),
	};

	return ioctl(fd, DM_DEV_ARM_POLL, &ioctl_data) ? -errno : 0;
}

/* Before all descriptors are closed: libdevmapper may hold one. */
void dm_close(void)
{
	dm_lib_release();
}

/*
 * The devices of a server
 *
 * A server makes overlays for its clients. It keeps each of them open and has
 * the kernel remove it with the last close, so that they go away with the server
 * however that ends. Only one that is killed between the two steps leaves a
 * device behind. Their UUIDs name the server, as <pid namespace>-<pid>-<start>,
 * so that whoever sweeps can tell what is left over from what is just being made.
 */

/* The server that process @pid is or was. Return: -errno when there is no such process. */
static int server_id(pid_t pid, char id[64])
{
	char *path = xasprintf("/proc/%ld/stat", (long)pid), text[1024], *field;
	int err = read_line(path, text, sizeof(text));
	struct stat st = { 0 };

	free(path);
	if (err)
		return err;
	/* A kernel without namespaces has no such file. */
	stat("/proc/self/ns/pid", &st);
	/* The second field is the name, in which there may be anything. */
	field = strrchr(text, ')');
	for (int i = 3; field && i <= 22; i++)
		field = strchr(field + 1, ' ');
	if (!field)
		return -EIO;
	snprintf(id, 64, "%lu-%ld-%.*s", (unsigned long)st.st_ino, (long)pid,
		 (int)strspn(field + 1, "0123456789"), field + 1);
	return 0;
}

static int find_server(const char *mangled, dev_t *dev)
{
	struct dm_task *task = task_new(DM_DEVICE_INFO, mangled);
	struct dm_info info;
	int err = task_run(task);

	if (!err && (!dm_task_get_info(task, &info) || !info.exists))
		err = -ENODEV;
	if (!err)
		*dev = makedev(info.major, info.minor);
	if (task)
		dm_task_destroy(task);
	return err;
}

/*
 * Removes a device of a server, in silence: at once, or when it is closed.
 * Return: -EBUSY when it shall be removed at once but is open.
 */
int dm_server_remove(const char *mangled, bool when_closed)
{
	struct dm_task *task = task_new(DM_DEVICE_REMOVE, mangled);
	uint32_t cookie = 0;
	int err = -ENOMEM;

	if (task && (!when_closed || dm_task_deferred_remove(task)) &&
	    dm_task_set_cookie(task, &cookie, SERVER_UDEV)) {
		err = task_run(task);
		dm_udev_wait(cookie);
	}
	if (task)
		dm_task_destroy(task);
	return err == -ENXIO ? 0 : err;
}

static int server_create(const char *mangled, uint64_t sectors, const char *params, dev_t *dev)
{
	char id[64], *prefix;
	int err = server_id(getpid(), id);

	if (err)
		return fail(err, "cannot create %s: /proc is not mounted", mangled);
	prefix = xasprintf(SERVER_PREFIX "%s-", id);
	err = create(mangled, mangled, prefix, SERVER_UDEV, sectors, params);
	free(prefix);
	if (err)
		return err;
	err = find_server(mangled, dev);
	if (err) {
		dm_server_remove(mangled, false);
		return fail(err, "cannot find %s: %s", mangled, strerror(-err));
	}
	return 0;
}

/*
 * Opens a device that was just made, and has it removed when it is closed. Return: the
 * file descriptor, or -errno after a message, with nothing left.
 */
static int keep(const char *mangled, int flags, dev_t dev)
{
	char *path = xasprintf("/dev/dm-%u", minor(dev));
	int fd = open(path, flags | O_CLOEXEC), err = 0;

	if (fd < 0)
		err = fail(-errno, "cannot open %s: %m", path);
	else if (dm_server_remove(mangled, true))
		err = fail(-EIO, "cannot have %s removed with its last user", mangled);
	free(path);
	if (!err)
		return fd;
	if (fd >= 0)
		close(fd);
	dm_server_remove(mangled, false);
	return err;
}

/* Makes a device of this process and opens it; it goes when it is closed. */
int dm_server_open(const char *mangled, uint64_t sectors, const char *params, int flags,
		   dev_t *dev)
{
	return server_create(mangled, sectors, params, dev) ?: keep(mangled, flags, *dev);
}

/* Removes the device if it is left over from a server that is gone. */
static void sweep_one(const char *mangled)
{
	struct dm_task *task = task_new(DM_DEVICE_INFO, mangled);
	char id[64], now[64], self[64];
	struct dm_info info;
	bool left = false;
	const char *uuid;
	long pid;

	if (!task_run(task) && dm_task_get_info(task, &info) && info.exists && !info.open_count) {
		uuid = dm_task_get_uuid(task);
		if (!strncmp(uuid, SERVER_PREFIX, strlen(SERVER_PREFIX)) &&
		    sscanf(uuid + strlen(SERVER_PREFIX), "%*[0-9]-%ld", &pid) == 1 && pid > 0) {
			snprintf(id, sizeof(id), "%s", uuid + strlen(SERVER_PREFIX));
			if (strrchr(id, '-'))
				*strrchr(id, '-') = '\0';
			/* Processes of another namespace cannot be looked for. */
			left = !server_id(getpid(), self) &&
			       strcspn(self, "-") == strcspn(id, "-") &&
			       !strncmp(self, id, strcspn(id, "-")) &&
			       (server_id(pid, now) || strcmp(now, id));
		}
	}
	if (task)
		dm_task_destroy(task);
	if (left)
		dm_server_remove(mangled, false);
}

/* Removes what servers that were killed have left over. */
void dm_server_sweep(void)
{
	struct dm_task *task = task_new(DM_DEVICE_LIST, NULL);
	struct dm_names *names = task_run(task) ? NULL : dm_task_get_names(task);

	while (names && names->dev) {
		sweep_one(names->name);
		names = names->next ? (void *)((char *)names + names->next) : NULL;
	}
	if (task)
		dm_task_destroy(task);
}

/* A message in silence to the device of this number, and its answer (to be freed). */
int dm_ask(dev_t dev, const char *message, char **answer)
{
	return send(task_for_number(DM_DEVICE_TARGET_MSG, major(dev), minor(dev)), message,
		    answer);
}

/*
 * Frozen views: each is a device of the process that made it, as those of a server are,
 * and is removed with it in the same way.
 */

static int load_view(const char *mangled, const struct cow *cow)
{
	struct dm_task *task = task_new(DM_DEVICE_RELOAD, mangled);
	char params[64];
	int err = -ENOMEM;

	snprintf(params, sizeof(params), "%u:%u %u:%u", cow->major, cow->minor, cow->table.major,
		 cow->table.minor);
	if (task && dm_task_set_ro(task) &&
	    dm_task_add_target(task, 0, cow->sectors, TARGET "-view", params))
		err = task_run(task);
	if (task)
		dm_task_destroy(task);
	if (err == -EINVAL)
		return fail(-ENOPKG, "the module " MODULE " is too old to freeze %s", cow->name);
	return err ? fail(err, "cannot freeze %s: %s", cow->name, strerror(-err)) : 0;
}

/*
 * Makes a view of @cow and opens it, as dm_server_open() does. With its first resume
 * it shows @cow as that is then.
 */
int dm_view_open(const char *mangled, const struct cow *cow, dev_t *dev)
{
	int err = server_create(mangled, 0, NULL, dev);

	if (err)
		return err;
	err = load_view(mangled, cow);
	if (err) {
		dm_server_remove(mangled, false);
		return err;
	}
	return keep(mangled, O_RDONLY, *dev);
}

/* Return: whether a view had no memory to keep what its device had. */
bool dm_view_failed(dev_t dev)
{
	struct dm_task *task;
	const char *target;
	char *params;
	uint64_t sectors;
	bool failed = !query(DM_DEVICE_STATUS, major(dev), minor(dev), &task, &target, &params,
			     &sectors) && params && !strncmp(params, "failed", 6);

	if (task)
		dm_task_destroy(task);
	return failed;
}

/* The device is not removed with its last user any more. */
void dm_cancel_remove(const char *mangled)
{
	send(task_new(DM_DEVICE_TARGET_MSG, mangled), "@cancel_deferred_remove", NULL);
}
