// SPDX-License-Identifier: GPL-2.0-only
/*
 * The command line: one table of commands and one of keys give dispatch,
 * checks and help.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cowctl.h"

#define KEY(k)	(1U << KEY_##k)

static const struct {
	const char *name;
	const char *value;
	const char *help;
} keys[KEY_COUNT] = {
	[KEY_BASE] = { "base", "BASE",
		       "block device, image file, or NBD export:\n"
		       "\t\t\t       nbd://HOST[:PORT][/EXPORT],\n"
		       "\t\t\t       nbd+unix:///[EXPORT]?socket=PATH" },
	[KEY_LIMIT] = { "limit", "LIMIT",
			"the most it may store: 4G, 25% (of RAM) or none" },
	[KEY_SIZE] = { "size", "SIZE", "of the device; by default that of BASE (create)" },
	[KEY_ROUND] = { "round", "up|down", "to blocks of 4096 bytes; down by default" },
	[KEY_SOCKET] = { "socket", "PATH", "listen on this Unix socket" },
	[KEY_PORT] = { "port", "PORT", "listen on this TCP port; 10809 with address=" },
	[KEY_ADDRESS] = { "address", "ADDRESS", "and on this address; 127.0.0.1 with port=" },
	[KEY_SERVER] = { "server", "nbdcow|nbdkit|nbd-server",
			 "what serves it; nbdcow by default, if installed" },
	[KEY_FORCE] = { "force", "true|false", "even if something speaks against it" },
	[KEY_COW_ON_READ] = { "cow-on-read", "true|false|PATH",
			      "keep what is read from BASE in its cache;\n"
			      "\t\t\t       PATH: while that exists (not with serve)" },
	[KEY_COW_ON_CACHE] = { "cow-on-cache", "true|false", "keep what is read ahead" },
	[KEY_CACHE_LIMIT] = { "cache-limit", "LIMIT", "the most the cache of BASE may hold" },
	[KEY_CACHE] = { "cache", "drop", "forget what the cache of the base holds" },
	[KEY_ON_BASE_ERROR] = { "on-base-error", "error|queue",
				"reads fail while BASE is away, or wait for it" },
	[KEY_PARTITIONS] = { "partitions", "true|false", "make devices for its partitions" },
	[KEY_HOLES] = { "holes", "true|false",
			"ask an NBD server for its holes; true by default" },
	[KEY_RANGE] = { "range", "START-END", "from and to where, such as 1G-2G; all by default" },
	[KEY_RATE] = { "rate", "SIZE", "the most to read in a second" },
	[KEY_WAIT] = { "wait", "true|false", "until it is done; true by default" },
	[KEY_SORT] = { "sort", "used|rate|name", "what comes first; used by default" },
	[KEY_DELAY] = { "delay", "SECONDS", "from one look to the next; 1 by default" },
	[KEY_LOOKS] = { "count", "NUMBER", "of looks, then end; without end by default" },
	[KEY_THRESHOLD] = { "threshold", "THRESHOLD",
			    "what is to be used: 4G, or 80% (of the limit)" },
	[KEY_TIMEOUT] = { "timeout", "SECONDS", "the most to wait; without end by default" },
	[KEY_PER_CLIENT] = { "per-client", "true|false", "a copy for each connection" },
	[KEY_PER_EXPORT_NAME] = { "per-export-name", "true|false", "a copy for each export name" },
	[KEY_MAX_CLIENTS] = { "max-clients", "NUMBER", "the most copies; 256 by default" },
	[KEY_OUTPUT] = { "output", "FILE.svg", "draw it into this file" },
	[KEY_BACKING] = { "backing", "PATH", "what FILE is to stand on; BASE by default" },
	[KEY_FORMAT] = { "format", "FORMAT", "format of what backing= names; raw by default" },
	[KEY_TO] = { "to", "PATH", "block device or file with the content of BASE" },
};

static const struct command {
	const char *name;
	int (*run)(const struct args *args);
	const char *usage;
	const char *help;
	unsigned int keys;
	bool can_run;			/* takes -- COMMAND */
	bool no_name;			/* takes no NAME */
	bool many;			/* NAME is that of many devices */
	bool can_stop;			/* takes the word stop */
	bool takes_file;		/* takes a FILE after NAME */
} commands[] = {
	{
		.name = "create",
		.run = cmd_create,
		.usage = "[NAME] base=BASE [key=value...]",
		.help = "make a temporary writable copy of BASE",
		.keys = KEY(BASE) | KEY(LIMIT) | KEY(SIZE) | KEY(ROUND) | KEY(COW_ON_READ) |
			KEY(COW_ON_CACHE) | KEY(CACHE_LIMIT) | KEY(ON_BASE_ERROR) | KEY(HOLES) |
			KEY(PARTITIONS),
	}, {
		.name = "remove",
		.run = cmd_remove,
		.usage = "[NAME]",
		.help = "remove a copy, and all that was written to it",
	}, {
		.name = "list",
		.run = cmd_list,
		.usage = "",
		.help = "show all copies",
		.no_name = true,
	}, {
		.name = "status",
		.run = cmd_status,
		.usage = "[NAME] [--prometheus] [--watch]",
		.help = "show one copy in detail; with --watch what happens",
		.keys = KEY(SORT) | KEY(DELAY) | KEY(LOOKS),
	}, {
		.name = "top",
		.run = cmd_top,
		.usage = "[sort=used|rate|name] [delay=SECONDS] [count=NUMBER]",
		.help = "watch all copies",
		.keys = KEY(SORT) | KEY(DELAY) | KEY(LOOKS),
		.no_name = true,
	}, {
		.name = "wait",
		.run = cmd_wait,
		.usage = "[NAME] threshold=THRESHOLD [timeout=SECONDS] [-- COMMAND [ARG...]]",
		.help = "wait until so much of a copy is used, then run COMMAND",
		.keys = KEY(THRESHOLD) | KEY(TIMEOUT),
		.can_run = true,
	}, {
		.name = "changes",
		.run = cmd_changes,
		.usage = "[NAME]",
		.help = "list the ranges that were written or zeroed",
	}, {
		.name = "map",
		.run = cmd_map,
		.usage = "[NAME] [output=FILE.svg]",
		.help = "draw where a copy was changed",
		.keys = KEY(OUTPUT),
	}, {
		.name = "diff",
		.run = cmd_diff,
		.usage = "[NAME] FILE [backing=PATH] [format=FORMAT]",
		.help = "keep what was changed, as a qcow2 image",
		.keys = KEY(BACKING) | KEY(FORMAT),
		.takes_file = true,
	}, {
		.name = "load",
		.run = cmd_load,
		.usage = "[NAME] FILE [force=true]",
		.help = "make the changes that diff has kept in a fresh copy",
		.keys = KEY(FORCE),
		.takes_file = true,
	}, {
		.name = "commit",
		.run = cmd_commit,
		.usage = "[NAME] to=PATH [force=true]",
		.help = "write what was changed to a duplicate of BASE",
		.keys = KEY(TO) | KEY(FORCE),
	}, {
		.name = "reset",
		.run = cmd_reset,
		.usage = "[NAME] [force=true]",
		.help = "forget all that was written to a copy",
		.keys = KEY(FORCE),
	}, {
		.name = "set",
		.run = cmd_set,
		.usage = "[NAME] key=value...",
		.help = "change a copy while it is in use",
		.keys = KEY(LIMIT) | KEY(SIZE) | KEY(COW_ON_READ) | KEY(COW_ON_CACHE) |
			KEY(CACHE_LIMIT) | KEY(CACHE) | KEY(ON_BASE_ERROR) | KEY(PARTITIONS),
	}, {
		.name = "prefetch",
		.run = cmd_prefetch,
		.usage = "[NAME] [stop] [range=START-END] [rate=SIZE] [wait=false]",
		.help = "read the base of a copy into its cache",
		.keys = KEY(RANGE) | KEY(RATE) | KEY(WAIT),
		.can_stop = true,
	}, {
		.name = "rebase",
		.run = cmd_rebase,
		.usage = "[NAME] base=BASE [force=true] [holes=false]",
		.help = "move a copy to another base of the same content",
		.keys = KEY(BASE) | KEY(FORCE) | KEY(HOLES),
	}, {
		.name = "export",
		.run = cmd_export,
		.usage = "[NAME] [socket=PATH | port=PORT address=ADDRESS] [server=SERVER]",
		.help = "serve a copy over NBD",
		.keys = KEY(SOCKET) | KEY(PORT) | KEY(ADDRESS) | KEY(SERVER),
	}, {
		.name = "unexport",
		.run = cmd_unexport,
		.usage = "[NAME]",
		.help = "stop serving a copy",
	}, {
		.name = "serve",
		.run = cmd_serve,
		.usage = "[NAME] base=BASE [key=value...]",
		.help = "serve copies of BASE over NBD, made for those who connect",
		.many = true,
		.keys = KEY(BASE) | KEY(PER_CLIENT) | KEY(PER_EXPORT_NAME) | KEY(LIMIT) |
			KEY(MAX_CLIENTS) | KEY(COW_ON_READ) | KEY(COW_ON_CACHE) |
			KEY(CACHE_LIMIT) | KEY(HOLES) | KEY(SOCKET) | KEY(PORT) | KEY(ADDRESS),
	},
	{ .name = NULL }
};

const char *key_name(enum key key)
{
	return keys[key].name;
}

static const struct command *find_command(const char *name)
{
	for (const struct command *c = commands; c->name; c++)
		if (!strcmp(c->name, name))
			return c;
	return NULL;
}

static void help_command(const struct command *command)
{
	printf("Usage: cowctl %s%s%s\n\n%s\n", command->name, *command->usage ? " " : "",
	       command->usage, command->help);
	if (command->keys)
		putchar('\n');
	for (int i = 0; i < KEY_COUNT; i++) {
		char *text;

		if (!(command->keys & (1U << i)))
			continue;
		text = xasprintf("%s=%s", keys[i].name, keys[i].value);
		printf("  %-28s%s%s\n", text, strlen(text) > 28 ? "\n\t\t\t       " : " ",
		       keys[i].help);
		free(text);
	}
	if (!command->no_name)
		printf("\nNAME is \"cow\" unless given; the device is /dev/mapper/NAME%s.\n",
		       command->many ? "-PID-NUMBER" : "");
}

static void help(void)
{
	puts("Usage: cowctl COMMAND [NAME] [key=value...] [--json]\n\n"
	     "Temporary writable copies of block devices.\n");
	for (const struct command *c = commands; c->name; c++)
		printf("  %-9s %s\n", c->name, c->help);
	puts("  help      explain a command\n\n"
	     "  --json        print what is reported as JSON\n"
	     "  --prometheus  print what status tells as Prometheus reads it\n"
	     "  --watch       show with status what happens, as top does\n"
	     "  --help        print this help\n"
	     "  --version     print the version\n\n"
	     "\"cowctl help COMMAND\" tells more, and the manual page cowctl(8) all.");
}

static int parse_key(const struct command *command, const char *text, struct args *args)
{
	const char *words[KEY_COUNT + 1], *guess;
	size_t length = strcspn(text, "="), n = 0;
	char *name = strndup(text, length);
	int err = 0;

	for (int i = 0; i < KEY_COUNT; i++) {
		if (!(command->keys & (1U << i)))
			continue;
		words[n++] = keys[i].name;
		if (!name || strcmp(name, keys[i].name))
			continue;
		if (args->value[i])
			err = fail(-EINVAL, "%s= is given twice", name);
		else if (!text[length + 1])
			err = fail(-EINVAL, "%s= has no value", name);
		args->value[i] = text + length + 1;
		goto out;
	}
	words[n] = NULL;
	guess = name ? nearest(name, words) : NULL;
	err = fail(-EINVAL, guess ? "%s does not know %s=; did you mean %s=?" :
		   "%s does not know %s=; see \"cowctl help %s\"", command->name, name ?: text,
		   guess ?: command->name);
out:
	free(name);
	return err;
}

static bool is_key(const struct command *command, const char *word)
{
	bool takes_path = command->takes_file || command->keys & KEY(BASE);

	/* A path or an address may have that in it, too. */
	return strchr(word, '=') && !(takes_path && word[strcspn(word, "=/")] == '/');
}

/* The word after the name; or, where that is not given, one that shows to be a file. */
static bool is_file(const struct command *command, char **words, const struct args *args)
{
	const char *end = strrchr(*words, '.');

	if (args->name || strchr(*words, '/'))
		return true;
	if (!end || strcmp(end, ".qcow2"))
		return false;
	while (*++words && is_key(command, *words))
		;
	return !*words;
}

static int parse_args(const struct command *command, char **words, struct args *args)
{
	const char *reason;
	int err;

	for (; *words; words++) {
		if (is_key(command, *words)) {
			err = parse_key(command, *words, args);
			if (err)
				return err;
		} else if (strchr(*words, '/') && command->keys & KEY(BASE) &&
			   !args->value[KEY_BASE]) {
			/* No name has a slash in it, so this is what is meant. */
			args->value[KEY_BASE] = *words;
		} else if (command->can_stop && !args->stop && !strcmp(*words, "stop")) {
			args->stop = true;
		} else if (command->takes_file && !args->file && is_file(command, words, args)) {
			args->file = *words;
		} else if (!command->no_name && !args->name) {
			args->name = *words;
		} else {
			bool base = command->keys & KEY(BASE) && !args->value[KEY_BASE];

			return fail(-EINVAL, base ?
				    "%s: one argument too many: %s; did you mean base=%s?" :
				    "%s: one argument too many: %s", command->name, *words,
				    *words);
		}
	}
	args->named = args->name;
	if (!args->name)
		args->name = "cow";
	reason = name_error(args->name);
	if (!reason && mangle_name(args->name, args->mangled))
		reason = "is too long: other than plain characters count as four";
	return reason ? fail(-EINVAL, "the name \"%s\" %s", args->name, reason) : 0;
}

static int unknown_command(const char *name)
{
	const char *words[sizeof(commands) / sizeof(commands[0])], *guess;
	size_t n = 0;

	for (const struct command *c = commands; c->name; c++)
		words[n++] = c->name;
	words[n] = NULL;
	guess = nearest(name, words);
	return fail(-EINVAL, guess ? "there is no command %s; did you mean %s?" :
		    "there is no command %s; see \"cowctl --help\"", name, guess);
}

static int help_about(const char *name)
{
	bool all = !name || !strcmp(name, "help");
	const struct command *command = all ? NULL : find_command(name);

	if (!all && !command)
		return unknown_command(name);
	if (command)
		help_command(command);
	else
		help();
	return 0;
}

/* The programs that are run may stand where root's PATH ends under sudo or cron. */
static void complete_path(void)
{
	const char *path = getenv("PATH");
	char *full = xasprintf("%s%s/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin", path ?: "",
			       path && *path ? ":" : "");

	setenv("PATH", full, 1);
	free(full);
}

static int run_command(char **words, struct args *args, bool want_help)
{
	const struct command *command;
	int err;

	if (!words[0] && !want_help) {
		help();
		return -EINVAL;
	}
	if (!words[0] || want_help)
		return help_about(words[0]);
	if (!strcmp(words[0], "help"))
		return words[1] && words[2] ?
		       fail(-EINVAL, "help: one argument too many: %s", words[2]) :
		       help_about(words[1]);
	command = find_command(words[0]);
	if (!command)
		return unknown_command(words[0]);
	if (args->prometheus && command->run != cmd_status)
		return fail(-EINVAL, "--prometheus belongs to status, not to %s", command->name);
	if (args->watch && command->run != cmd_status)
		return fail(-EINVAL, "--watch belongs to status, not to %s", command->name);
	err = parse_args(command, words + 1, args);
	if (err)
		return err;
	if (geteuid())
		return fail(-EPERM, "%s: you must be root to do this", command->name);
	args->umask = umask(022);
	complete_path();
	dm_init();
	return command->run(args);
}

/*
 * Cuts off what follows the -- behind a command that runs it; with other commands
 * it means that no options follow. Return: what was cut off, or NULL.
 */
static char **cut_off_command(int *argc, char **argv)
{
	const struct command *command;
	int i = 1;

	/* No option has an argument. */
	while (i < *argc && *argv[i] == '-')
		i++;
	command = i < *argc ? find_command(argv[i]) : NULL;
	for (; command && command->can_run && i < *argc; i++)
		if (!strcmp(argv[i], "--")) {
			argv[i] = NULL;
			*argc = i;
			return argv + i + 1;
		}
	return NULL;
}

/* What is opened must not get the place of a closed output, and what is said be written to it. */
static void fill_closed(void)
{
	int fd;

	/* For reading only, so that it is noticed when output is lost. */
	do
		fd = open("/dev/null", O_RDONLY);
	while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		close(fd);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "help", no_argument, NULL, 'h' },
		{ "json", no_argument, NULL, 'j' },
		{ "prometheus", no_argument, NULL, 'p' },
		{ "version", no_argument, NULL, 'V' },
		{ "watch", no_argument, NULL, 'w' },
		{ .name = NULL }
	};
	struct args args = { .command = cut_off_command(&argc, argv) };
	bool want_help = false, want_version = false;
	sigset_t all;
	char *posix = getenv("POSIXLY_CORRECT") ? strdup(getenv("POSIXLY_CORRECT")) : NULL;
	int c, err = 0;

	fill_closed();
	/* Who started us may have had it ignored; then nobody's status could be waited for. */
	signal(SIGCHLD, SIG_DFL);
	opterr = 0;
	/* Options may follow the command everywhere; only what "wait" runs is to see it. */
	unsetenv("POSIXLY_CORRECT");
	/* No letters: what is not understood is then always the whole of a word. */
	while ((c = getopt_long_only(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 'h':
			want_help = true;
			break;
		case 'j':
			args.json = true;
			break;
		case 'p':
			args.prometheus = true;
			break;
		case 'w':
			args.watch = true;
			break;
		case 'V':
			want_version = true;
			break;
		default:
			fail(-EINVAL, "there is no option %s; see \"cowctl --help\"",
			     argv[optind - 1]);
			return EXIT_USAGE;
		}
	}
	if (posix)
		setenv("POSIXLY_CORRECT", posix, 1);
	free(posix);
	if (want_version)
		puts("cowctl " VERSION);
	else
		err = run_command(argv + optind, &args, want_help);
	err = flush_output(err);
	/* The signal was held back until all was undone; a success it does not undo. */
	if (err == -EINTR) {
		sigfillset(&all);
		sigprocmask(SIG_UNBLOCK, &all, NULL);
	}
	return exit_code(err);
}
