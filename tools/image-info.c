// SPDX-License-Identifier: GPL-2.0-only
/* What "qemu-img info" and "qemu-img check" print as JSON. */
#include <errno.h>
#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"

/* Return: the number, or 0 where there is none from 0 on. */
static uint64_t number(struct json_object *object, const char *key)
{
	struct json_object *member = json_object_object_get(object, key);

	return json_object_is_type(member, json_type_int) && json_object_get_int64(member) > 0 ?
	       json_object_get_int64(member) : 0;
}

/* Return: the text (to be freed), or NULL where there is none. */
static char *string(struct json_object *object, const char *key)
{
	struct json_object *member = json_object_object_get(object, key);

	return json_object_is_type(member, json_type_string) ?
	       strdup(json_object_get_string(member)) : NULL;
}

/* Return: 0, or -EINVAL when it is no JSON object; image_info_free() is for both. */
int parse_image_info(const char *text, struct image_info *info)
{
	struct json_object *object = json_tokener_parse(text);
	bool valid = json_object_is_type(object, json_type_object);

	memset(info, 0, sizeof(*info));
	if (valid) {
		info->bytes = number(object, "virtual-size");
		info->end = number(object, "image-end-offset");
		info->compressed = number(object, "compressed-clusters");
		info->encrypted =
			json_object_get_boolean(json_object_object_get(object, "encrypted"));
		info->backing = string(object, "backing-filename");
		info->format = string(object, "backing-filename-format");
	}
	json_object_put(object);
	return valid ? 0 : -EINVAL;
}

void image_info_free(struct image_info *info)
{
	free(info->backing);
	free(info->format);
}
