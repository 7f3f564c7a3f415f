// SPDX-License-Identifier: GPL-2.0-only
/*
 * status --prometheus: what status --json tells, in the text format that
 * Prometheus reads. Names end as its conventions want: in the unit, and in total
 * where the value only grows.
 */
#include <inttypes.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>

#include "cowctl.h"

static const struct {
	const char *name;
	const char *key;		/* in the JSON of a device */
	const char *help;
} metrics[] = {
	{ "size_bytes", "size", "Size of the device" },
	{ "used_bytes", "used", "Memory that holds what was written" },
	{ "limit_bytes", "limit", "The most it may store; +Inf without a limit" },
	{ "peak_bytes", "peak", "The most it ever stored" },
	{ "zeroed_bytes", "zeroed", "Trimmed or zeroed, without memory" },
	{ "metadata_bytes", "metadata", "Memory of the map" },
	{ "open", "open_count", "How many have the device open" },
	{ "queued_reads", "queued", "Reads that wait for the base to come back" },
	{ "cache_bytes", "cached", "What the cache of the base holds, for all its devices" },
	{ "writes_refused_total", "writes_refused", "Writes that failed for want of space" },
	{ "base_errors_total", "base_errors", "Reads of the base that failed" },
	{ "overlay_read_bytes_total", "overlay_reads", "Read from what was written" },
	{ "cache_read_bytes_total", "hits", "Read from the cache of the base" },
	{ "cache_fill_bytes_total", "misses", "Read once it had been read into the cache" },
	{ "base_read_bytes_total", "base_reads", "Read from the base, past its cache" },
	{ "cache_evicted_bytes_total", "evicted", "Dropped from the cache for want of room" },
};

static const char *const states[] = { "ok", "high", "full", "base-error" };

/* A label's value, escaped as the format wants it. */
static void print_label(struct json_object *device, const char *key)
{
	const char *text = json_object_get_string(json_object_object_get(device, key));

	printf("%s=\"", key);
	for (; text && *text; text++) {
		if (*text == '\n')
			fputs("\\n", stdout);
		else
			printf("%s%c", *text == '"' || *text == '\\' ? "\\" : "", *text);
	}
	putchar('"');
}

static void print_head(const char *name, const char *help)
{
	size_t length = strlen(name);
	bool counter = length > 6 && !strcmp(name + length - 6, "_total");

	printf("# HELP nbdcow_%s %s\n# TYPE nbdcow_%s %s\n", name, help, name,
	       counter ? "counter" : "gauge");
}

static void print_sample(struct json_object *device, const char *name, const char *key)
{
	struct json_object *value = json_object_object_get(device, key);

	printf("nbdcow_%s{", name);
	print_label(device, "name");
	putchar(',');
	print_label(device, "base");
	if (value)
		printf("} %" PRIu64 "\n", json_object_get_uint64(value));
	else
		puts("} +Inf");
}

static void print_health(struct json_object *device)
{
	const char *health = json_object_get_string(json_object_object_get(device, "health"));

	for (size_t i = 0; i < sizeof(states) / sizeof(states[0]); i++) {
		printf("nbdcow_health{");
		print_label(device, "name");
		printf(",state=\"%s\"} %d\n", states[i], !strcmp(health, states[i]));
	}
}

/* @list: an array of devices */
void print_prometheus(struct json_object *list)
{
	size_t nr = json_object_array_length(list);

	for (size_t i = 0; nr && i < sizeof(metrics) / sizeof(metrics[0]); i++) {
		print_head(metrics[i].name, metrics[i].help);
		for (size_t j = 0; j < nr; j++)
			print_sample(json_object_array_get_idx(list, j), metrics[i].name,
				     metrics[i].key);
	}
	if (nr)
		print_head("health", "1 for the state the device is in");
	for (size_t j = 0; j < nr; j++)
		print_health(json_object_array_get_idx(list, j));
}
