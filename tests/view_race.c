// SPDX-License-Identifier: GPL-2.0-only
/*
 * view_race - freezes views of an overlay that is being rewritten, and checks that
 * each shows one instant and goes on showing it
 *
 * usage: view_race OVERLAY SECTORS BASE SECONDS BLOCKS
 *
 * Each writer goes through its own of so many blocks, which are all over the device,
 * again and again, in an order that jumps, and waits for each write. So at any
 * instant the first blocks of its order are of one pass, and the rest of the pass
 * before. Prints the number of views; what goes wrong is told in a line that begins
 * with '#', and the exit status is 1.
 */
#define _GNU_SOURCE
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "dmctl.h"

#define BLOCK 4096
#define WRITERS 3
#define STRIDE 7919		/* a prime: no writer's number of blocks is a multiple */

static uint64_t blocks;		/* of each writer */
static uint64_t spacing;	/* from one to the next, in blocks */
static int fd;
static volatile bool stop;

static void __attribute__((format(printf, 1, 2), noreturn)) die(const char *fmt, ...)
{
	va_list args;

	printf("# ");
	va_start(args, fmt);
	vprintf(fmt, args);
	va_end(args);
	putchar('\n');
	fflush(stdout);
	_exit(1);
}

/* Which of all the blocks the writer comes to as its @i-th. */
static uint64_t block_at(unsigned int writer, uint64_t i)
{
	return i * STRIDE % blocks * WRITERS + writer;
}

static off_t offset_of(uint64_t block)
{
	return block * spacing * BLOCK;
}

/* What it leaves there: every fourth pass discards. */
static uint64_t value(uint64_t pass)
{
	return pass % 4 ? pass : 0;
}

static void write_block(uint64_t *buf, uint64_t block, uint64_t pass)
{
	uint64_t range[] = { offset_of(block), BLOCK };
	/* whole blocks, and single sectors of them one after the other */
	size_t n = pass % 2 ? BLOCK : 512;

	if (!value(pass)) {
		if (ioctl(fd, BLKDISCARD, range))
			die("discard of block %ju: %m", (uintmax_t)block);
		return;
	}
	for (size_t i = 0; i < BLOCK / sizeof(*buf); i++)
		buf[i] = pass;
	for (size_t done = 0; done < BLOCK; done += n)
		if (pwrite(fd, buf, n, offset_of(block) + done) != (ssize_t)n)
			die("write of block %ju: %m", (uintmax_t)block);
}

static void *writer(void *arg)
{
	unsigned int number = (uintptr_t)arg;
	uint64_t *buf = aligned_alloc(BLOCK, BLOCK);

	for (uint64_t pass = 1; !stop; pass++)
		for (uint64_t i = 0; i < blocks && !stop; i++)
			write_block(buf, block_at(number, i), pass);
	free(buf);
	return NULL;
}

static void read_view(unsigned int minor_number, char *buf)
{
	char node[32];
	int view;

	snprintf(node, sizeof(node), "/dev/dm-%u", minor_number);
	view = open(node, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (view < 0)
		die("%s: %m", node);
	for (uint64_t i = 0; i < WRITERS * blocks; i++)
		if (pread(view, buf + i * BLOCK, BLOCK, offset_of(i)) != BLOCK)
			die("read of the view's block %ju: %m", (uintmax_t)(i * spacing));
	close(view);
}

/* Is the block of that pass, and if it is @torn of that or the one before? */
static bool is_of(const char *buf, uint64_t block, uint64_t pass, bool torn)
{
	const uint64_t *word = (const uint64_t *)(buf + block * BLOCK);

	for (size_t i = 0; i < BLOCK / sizeof(*word); i++)
		if (word[i] != value(pass) && !(torn && word[i] == value(pass - 1)))
			return false;
	return true;
}

static bool is_in_pass(const char *buf, unsigned int number, uint64_t pass)
{
	uint64_t i = 0;

	while (i < blocks && is_of(buf, block_at(number, i), pass, false))
		i++;
	/* the one that was being written */
	if (i < blocks && is_of(buf, block_at(number, i), pass, true))
		i++;
	while (i < blocks && is_of(buf, block_at(number, i), pass - 1, false))
		i++;
	return i == blocks;
}

static void check_view(const char *buf)
{
	for (unsigned int number = 0; number < WRITERS; number++) {
		uint64_t pass, newest = 0;

		for (uint64_t i = 0; i < blocks; i++) {
			memcpy(&pass, buf + block_at(number, i) * BLOCK, sizeof(pass));
			if (pass > newest)
				newest = pass;
		}
		if (!is_in_pass(buf, number, newest) && !is_in_pass(buf, number, newest + 1))
			die("writer %u, pass %ju: the view shows no instant", number,
			    (uintmax_t)newest);
	}
}

int main(int argc, char **argv)
{
	pthread_t threads[WRITERS];
	unsigned int number, views = 0;
	struct dm_call call;
	char *first, *second, params[300];
	uint64_t sectors;
	time_t end;
	int ret;

	if (argc != 6)
		return 2;
	sectors = strtoull(argv[2], NULL, 0);
	blocks = strtoull(argv[5], NULL, 0) / WRITERS;
	spacing = sectors / 8 / WRITERS / blocks;
	snprintf(params, sizeof(params), "%s %s", argv[1], argv[3]);
	end = time(NULL) + strtol(argv[4], NULL, 0);
	fd = open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC);
	first = aligned_alloc(BLOCK, WRITERS * blocks * BLOCK);
	second = aligned_alloc(BLOCK, WRITERS * blocks * BLOCK);
	if (fd < 0 || !first || !second)
		die("%s: %m", argv[1]);
	for (uintptr_t i = 0; i < WRITERS; i++) {
		uint64_t range[] = { 0, sectors * 512 };

		if (!i && ioctl(fd, BLKDISCARD, range))
			die("discard: %m");
		pthread_create(&threads[i], NULL, writer, (void *)i);
	}

	do {
		ret = dm_create("test-view") ?: dm_minor("test-view", &number) ?:
		      dm_load_flags("test-view", sectors, "nbdcow-view", params,
				    DM_READONLY_FLAG) ?:
		      dm_resume("test-view");
		if (ret)
			die("cannot make a view: %s", strerror(-ret));
		read_view(number, first);
		check_view(first);
		read_view(number, second);
		if (memcmp(first, second, WRITERS * blocks * BLOCK))
			die("the view has changed");
		ret = dm_status("test-view", &call);
		if (ret || strncmp(call.table.params, "ok ", 3))
			die("status of the view: %s %s", strerror(-ret), call.table.params);
		/* udev may look at it */
		while ((ret = dm_remove("test-view")) == -EBUSY)
			usleep(10000);
		if (ret)
			die("cannot remove the view: %s", strerror(-ret));
		views++;
	} while (time(NULL) < end);

	stop = true;
	for (int i = 0; i < WRITERS; i++)
		pthread_join(threads[i], NULL);
	printf("%u views\n", views);
	return 0;
}
