// SPDX-License-Identifier: GPL-2.0-only
/*
 * scale - makes many overlays on one base, uses all of them at once, and takes
 * them away again
 *
 * usage: scale DEVICES ROUNDS BASE
 *
 * Prints the least and the greatest minor number of the devices of each round,
 * and waits for a line on its input before the next one. What goes wrong is told
 * in a line that begins with '#', and the exit status is 1.
 */
#define _GNU_SOURCE
#include <linux/fs.h>
#include <stdarg.h>
#include <stdlib.h>

#include "dmctl.h"
#include "stamp.h"

#define BLOCK 4096
#define BLOCKS 16		/* of which each device has changes */

static unsigned int devices, rounds, round_number;
static uint64_t base_sectors;
static const char *base;
static char *buf;

static void __attribute__((format(printf, 1, 2), noreturn)) die(const char *fmt, ...)
{
	va_list args;

	printf("# round %u: ", round_number);
	va_start(args, fmt);
	vprintf(fmt, args);
	va_end(args);
	putchar('\n');
	exit(1);
}

static void check(int ret, const char *what, unsigned int i)
{
	if (ret)
		die("%s of device %u: %s", what, i, strerror(-ret));
}

static char *name_of(unsigned int i)
{
	static char name[32];

	snprintf(name, sizeof(name), "test-scale%u", i);
	return name;
}

static int open_device(unsigned int i)
{
	unsigned int number;
	char node[32];
	int fd;

	check(dm_minor(name_of(i), &number), "number", i);
	snprintf(node, sizeof(node), "/dev/dm-%u", number);
	fd = open(node, O_RDWR | O_DIRECT | O_CLOEXEC);
	if (fd < 0)
		die("%s: %s", node, strerror(errno));
	return fd;
}

/*
 * What device @i has at sector @sector: block 0 is written as a whole, block 1
 * in part, 2 and 3 are discarded, 4 to 11 are written by one request.
 */
static uint32_t tag_at(unsigned int i, uint64_t sector)
{
	if (sector < 8 || sector == 9 || (sector >= 32 && sector < 96))
		return TAG_FIRST + round_number * devices + i;
	return sector >= 16 && sector < 32 ? TAG_ZERO : TAG_BASE;
}

static void write_sectors(int fd, unsigned int i, uint64_t sector, uint64_t count)
{
	stamp_range(buf, sector, count, tag_at(i, sector));
	if (pwrite(fd, buf, count * SECTOR, sector * SECTOR) != (ssize_t)(count * SECTOR))
		die("writing sector %llu of device %u: %s", (unsigned long long)sector, i,
		    strerror(errno));
}

static void write_device(unsigned int i)
{
	uint64_t range[2] = { 2 * BLOCK, 2 * BLOCK };
	int fd = open_device(i);

	write_sectors(fd, i, 0, 8);
	write_sectors(fd, i, 9, 1);
	write_sectors(fd, i, 32, 64);
	if (ioctl(fd, BLKDISCARD, range))
		die("discard on device %u: %s", i, strerror(errno));
	close(fd);
}

static void check_device(unsigned int i, bool changed)
{
	int fd = open_device(i);
	uint64_t sector;

	if (pread(fd, buf, BLOCKS * BLOCK, 0) != BLOCKS * BLOCK)
		die("reading device %u: %s", i, strerror(errno));
	for (sector = 0; sector < BLOCKS * BLOCK / SECTOR; sector++) {
		uint32_t want = changed ? tag_at(i, sector) : TAG_BASE;

		if (stamp_tag(buf + sector * SECTOR, sector) != want) {
			printf("# device %u, sector %llu should have tag %u but has ", i,
			       (unsigned long long)sector, want);
			stamp_print(stdout, buf + sector * SECTOR, sector);
			putchar('\n');
			exit(1);
		}
	}
	close(fd);
}

static void check_status(unsigned int i, unsigned int used, unsigned int zeroed)
{
	struct dm_call call;
	unsigned int u, z;

	check(dm_status(name_of(i), &call), "status", i);
	if (sscanf(call.table.params, "ok %u/- %*u %u", &u, &z) != 2 || u != used || z != zeroed)
		die("status of device %u: %s", i, call.table.params);
}

static void play_round(void)
{
	unsigned int i, number, least = UINT32_MAX, most = 0;

	for (i = 0; i < devices; i++) {
		check(dm_create(name_of(i)), "creation", i);
		check(dm_load(name_of(i), base_sectors, "nbdcow", base), "table", i);
		check(dm_resume(name_of(i)), "resume", i);
		check(dm_minor(name_of(i), &number), "number", i);
		least = number < least ? number : least;
		most = number > most ? number : most;
	}
	for (i = 0; i < devices; i++)
		write_device(i);
	for (i = 0; i < devices; i++)
		check_device(i, true);
	for (i = 0; i < devices; i++) {
		check_status(i, 10, 2);
		/* the last ones go with all they have */
		if (i % 4 != 3)
			check(dm_message(name_of(i), "reset"), "reset", i);
	}
	for (i = 0; i < devices; i++) {
		if (i % 4 != 3)
			check_status(i, 0, 0);
		check_device(i, i % 4 == 3);
	}
	for (i = 0; i < devices; i++)
		check(dm_remove(name_of(i)), "removal", i);
	printf("%u %u\n", least, most);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	uint64_t bytes;
	char line[16];
	int fd;

	if (argc != 4) {
		fputs("usage: scale DEVICES ROUNDS BASE\n", stderr);
		return 2;
	}
	devices = atoi(argv[1]);
	rounds = atoi(argv[2]);
	base = argv[3];
	fd = open(base, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes) || posix_memalign((void **)&buf, BLOCK,
									BLOCKS * BLOCK))
		die("%s: %s", base, strerror(errno));
	close(fd);
	base_sectors = bytes / SECTOR;

	for (round_number = 0; round_number < rounds; round_number++) {
		play_round();
		if (round_number < rounds - 1 && !fgets(line, sizeof(line), stdin))
			die("nobody wants to go on");
	}
	return 0;
}
